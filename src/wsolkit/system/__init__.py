"""What the machine offers: files that are written whole, locks, signals, cores, names."""
