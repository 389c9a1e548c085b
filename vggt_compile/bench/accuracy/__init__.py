"""What a plan does to a model's geometry: runs, scores, intervals over scenes, and the page made from them."""
