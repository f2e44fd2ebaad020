"""How a module is trained and evaluated: what `wsolkit.build` and the commands attach to it."""
