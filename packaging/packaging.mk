# packaging.mk - what people install: files under PREFIX, a Debian package, a portable archive, images.

PREFIX  ?= /usr/local
LIBDIR  ?= lib
UNITDIR ?= lib/systemd/system
ZSHDIR  ?= share/zsh/site-functions
STRIP   ?= strip
VERSION := $(shell sed -n 's/.*QEMB_VERSION "\(.*\)"/\1/p' qemb.h)
# $(call files,ACTION,PROGRAMS): runs install.sh with the programs of that folder
files = DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" LIBDIR="$(LIBDIR)" UNITDIR="$(UNITDIR)" ZSHDIR="$(ZSHDIR)" STRIP="$(STRIP)" VERSION="$(VERSION)" PROGRAMS="$(2)" packaging/install.sh $(1)

.PHONY: install uninstall
install: qemb qemb-serve build/lib/libqemb.a ## programs, manuals, completion, the unit, the demo model and the C library under PREFIX (/usr/local); also while they run
	@$(call files,install,.)

uninstall: ## removes what make install put under PREFIX
	@$(call files,uninstall,.)
