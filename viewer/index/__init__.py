"""The feature index: built in one pass over text, kept in one folder."""
