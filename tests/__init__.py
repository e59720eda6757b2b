"""The tests; a package, as another one of this name comes with torch-fidelity."""
