"""The only folder that imports torch: from a trained `nn.Module` to a graph, relevance and ranges, and back."""
