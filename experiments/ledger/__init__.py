"""Published claims and figures, and the evidence for or against them."""
