"""Small trained models, a folder each in the hub's layout: what `from_pretrained("demo")` loads. Holds no code."""
