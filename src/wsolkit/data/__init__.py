"""From a data set's official files to batches: files → records → samples → batches."""
