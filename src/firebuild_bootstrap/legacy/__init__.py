"""Old peers: Go guests and servers, and ours of before `Session`. Nobody else knows them."""
