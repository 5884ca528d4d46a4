"""A module for each kind of data that frames are read from."""
