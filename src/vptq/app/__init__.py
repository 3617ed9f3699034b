"""The web chat: `vptq app`, and `python -m vptq.app` as in the published package.

Gradio does the page. Nothing on it comes from elsewhere, and nothing is reported anywhere: its analytics are off, and
its fonts are those of the machine.
"""
