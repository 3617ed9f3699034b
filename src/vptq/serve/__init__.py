"""A server for one model that speaks OpenAI's protocol: `vptq serve`.

`transformers serve` was read and tried first. It has no name for the model but its path, no limit on waiting requests,
no key, no usage in streams and no end mark; it ignores or refuses max_completion_tokens; and it loads and unloads any
model that a request names. Closing those gaps would have meant overriding every handler it has, in classes that are
private to it. Starlette and uvicorn (what it runs on as well) with transformers' `generate` are less code than that.
"""
