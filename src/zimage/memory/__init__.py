"""How a model fits into the memory there is: sizes, plans, and what carries a plan out."""
