# For a person at a terminal, behind log.sed: the time (UTC), method, path and status of each call, and refused tokens.

# Forget the substitutions so far: `t` is for those that follow.
t begin
: begin
s/^\{"event": "[^ ]+ - \\"([A-Z]+) ([^ ]+) HTTP[^ ]+ ([0-9]+)".*T([0-9:]+)[.0-9]*Z"\}$/\4  \3  \1 \2/
t
s/^\{"event": "(A token was refused: [^"]*)".*T([0-9:]+)[.0-9]*Z"\}$/\2  \1/
t
d
