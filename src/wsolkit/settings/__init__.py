"""Settings: compose, check and explain them, restore those of a checkpoint, run a command."""
