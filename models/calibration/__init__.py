"""Decoder layers run one at a time on calibration text: the inputs of their linears, second moments, output errors.

Rounding (``qat.ptq``) and pruning (``models.pruning``) both go through a model in this way. It knows neither codes nor masks.
"""
