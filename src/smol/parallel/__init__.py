"""How a decoder is spread over processes."""
