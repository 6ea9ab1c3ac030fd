"""Prediction of volumes of any size: the request, the trained network, one volume's work, its record."""
