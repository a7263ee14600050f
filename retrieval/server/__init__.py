"""The HTTP service: /v1, clip-retrieval's endpoints, and the page. Searches through
`retrieval.search`; how a search works is decided there.
"""
