# packaging.mk - what people install: a Debian package, a portable archive, images.
