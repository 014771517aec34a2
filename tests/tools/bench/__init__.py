"""`make bench`: the same work through this gateway, its peers, and no gateway at all."""
