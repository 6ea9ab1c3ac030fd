"""Components, tunnels and cavities of prediction and truth, counted by blocks, and scores made of them."""
