"""Talk to the operating system: write files whole, take locks, hear signals, count cores, encode names."""
