"""`flash-attn-res accuracy`: every storage mode and other packages against double precision.

``families`` draws the inputs, ``modes`` says how this package stores values, ``peers`` holds the
formulas and the adapters of other packages, ``network`` runs whole networks, ``metrics`` measures
errors, ``table`` runs all of them and ``command`` prints and stores what came out.
"""
