"""Changes of a model that leave its function as it is and its weights easier to round: AWQ, SmoothQuant, rotations.

``table.TRANSFORMS`` lists them. ``round_model`` applies one before it rounds, layer by layer.
"""
