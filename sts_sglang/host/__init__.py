"""The only room that knows SGLang's private names and fields: hooks, views, what is served, the binding."""
