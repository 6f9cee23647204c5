"""What runs and versions say: params, tags, cards, artifacts and their digests."""
