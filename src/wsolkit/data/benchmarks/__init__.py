"""Turn the official files of data sets into records, with one module for each data set."""
