"""One file for each data set, which turns its official files into records."""
