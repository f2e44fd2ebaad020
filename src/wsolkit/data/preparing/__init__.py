"""Download, unpack and index a data set."""
