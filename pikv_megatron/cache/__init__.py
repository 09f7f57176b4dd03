"""The cache itself: `cache.PiKVCache`, what it holds of requests and layers, and the order of the stages."""
