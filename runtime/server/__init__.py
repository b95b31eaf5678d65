"""`hotcold serve`: an OpenAI-compatible HTTP server over LLM (needs the extra `serve`).

    process.py    the port, the signals, models loading in the background: `serve()`
    app.py        which path is answered by what, and the OpenAPI document
    gate.py       what every request passes: key, Host, Origin, HEAD, counting, the last catch of errors
    bodies.py     a request's body: bounded, parsed, checked against schemas.py (requests) and shapes.py (replies)
    answers.py    one Reply sent whole or as server-sent events, until the client leaves or the server must end
    responses.py  /v1/responses in terms of a chat completion; small.py: embeddings, tokens, models
    service.py    the models, and whether they load, serve or stop; failures.py: every error's HTTP status
    work.py       threads for what takes long, and waiting for it as long as client and server both want it
    metrics.py    /metrics; page.py: the files of the chat page
"""
