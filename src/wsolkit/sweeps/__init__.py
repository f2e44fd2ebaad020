"""Tables, charts and a comparison of the runs of a sweep."""
