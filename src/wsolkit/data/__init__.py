"""Turn the official files of a data set into batches: files → records → samples → batches."""
