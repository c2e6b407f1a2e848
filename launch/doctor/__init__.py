"""`decoct doctor`: what is installed, which combinations are known to be bad, and what each verb lacks."""
