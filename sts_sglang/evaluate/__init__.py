"""What sparse verify loses, with a draft or without: asked of a real server, judged by a stated gate."""
