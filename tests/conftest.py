"""Puts this folder on the path, so that test files in it and below import `support` and `oracle`."""
