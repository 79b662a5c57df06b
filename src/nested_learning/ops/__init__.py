"""The memory rules as pure functions, each as a token loop (`naive`) and in matrix products (`chunk`)."""
