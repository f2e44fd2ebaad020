"""Make the tables and pictures that people look at."""
