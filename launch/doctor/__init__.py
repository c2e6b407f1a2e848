"""`decoct doctor`: installed packages, known bad combinations, and missing requirements of each verb."""
