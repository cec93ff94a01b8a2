"""One limit for the whole model: what every width, bit and group costs and loses, and the plan of the least loss."""
