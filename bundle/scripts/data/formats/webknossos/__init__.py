"""WEBKNOSSOS datasets: their description, the WKW format of older ones, and a lazy reader of layers."""
