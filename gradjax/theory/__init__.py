"""What theory says a measurement should be: mean field, random matrices, finite width."""
