"""What a pair loses under sparse verify: asked of a real server, judged by a gate stated beforehand."""
