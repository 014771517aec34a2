# What may be read of the server's log, for sed -E: lines that have exactly the shape of its access log, or are one of its words
# about itself. All else may quote a caller or a vendor, as its tracebacks do. No caller's text passes but a path of plain
# characters, without what follows the `?`, where keys have been seen.

s/^(\{"event": "[0-9a-f.:]+ - \\"[A-Z]+ []A-Za-z0-9_.~:@!$&'()*+,;=%/[-]{1,200})(\?.*)?( HTTP\/1\.[01]\\" [1-5][0-9][0-9]", "level": "info", "logger": "uvicorn\.access", "category": "server", "timestamp": "[0-9T:.-]+Z"\})$/\1\3/
t known

# An exception is told, its words are not.
s/^(\{"event": "Exception in ASGI application)\\n", "exc_info": \[.*\], ("level": "error", "logger": "uvicorn\.error", "category": "server", "timestamp": "[0-9T:.-]+Z"\})$/\1", \2/
t known

# The server does not say which it was.
s/^\{"category": "core::auth", "exc_info": true, "event": "Error during authentication", ("level": "error", "logger": "llama_stack\.core\.server\.auth", "timestamp": "[0-9T:.-]+Z"\})$/{"event": "A token was refused: it has expired, is for another audience or issuer, is not signed by a key at AUTH_JWKS_URI, or nothing answers there.", \1/
t known

# Its start and its end. Uvicorn's hint at Ctrl-C is left out: deploy/serve.sh has its own.
s/, "color_message": "[^"]*"//
s/ \(Press CTRL\+C to quit\)//
/^\{"event": "((Started|Finished) server process \[[0-9]+\]|Uvicorn running on https?:\/\/[]0-9A-Za-z.:[-]+|Waiting for application startup\.|Application startup complete\.|Shutting down|Waiting for application shutdown\.|Application shutdown complete\.|Invalid HTTP request received\.)", "level": "[a-z]+", "logger": "uvicorn\.error", "category": "server", "timestamp": "[0-9T:.-]+Z"\}$/!d

: known
