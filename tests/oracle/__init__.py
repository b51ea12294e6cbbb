"""Float64 reference implementations in NumPy, written from the equations and independent of the package under test."""
