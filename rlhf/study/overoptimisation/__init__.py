"""`prudent study overoptimisation`: which reward resists optimisation, and `prudent study warning`: what shows it
early."""
