# packaging.mk - what people install: files under PREFIX, a Debian package, a portable archive, images.

PREFIX  ?= /usr/local
LIBDIR  ?= lib
UNITDIR ?= lib/systemd/system
ZSHDIR  ?= share/zsh/site-functions
STRIP   ?= strip
VERSION := $(shell sed -n 's/.*QEMB_VERSION "\(.*\)"/\1/p' qemb.h)
# $(call files,ACTION,PROGRAMS,INTO): runs install.sh with the programs of one folder, into another
files = DESTDIR="$(DESTDIR)" INTO="$(3)" PREFIX="$(PREFIX)" LIBDIR="$(LIBDIR)" UNITDIR="$(UNITDIR)" ZSHDIR="$(ZSHDIR)" STRIP="$(STRIP)" VERSION="$(VERSION)" PROGRAMS="$(2)" packaging/install.sh $(1)

.PHONY: install uninstall
install: qemb qemb-serve build/lib/libqemb.a ## programs, manuals, completion, the unit, the demo model and the C library under PREFIX (/usr/local); also while they run
	@$(call files,install,.,$(DESTDIR)$(PREFIX))

uninstall: ## removes what make install put under PREFIX
	@$(call files,uninstall,.,$(DESTDIR)$(PREFIX))

# ---- the portable archive -------------------------------------------------------------------------

# Programs that need no library of the machine that they run on, glibc included: packaging/static.c
# has what they do without. The linker's warnings are about what static.c prevents.
STATIC := -static-pie -Wl,--no-warnings
build/static/qemb: $(patsubst %,build/release/%.o,$(FRONT) $(BACKEND) $(ENGINE) packaging/static)
	@mkdir -p $(@D)
	$(CC) $(STATIC) -fopenmp -pthread $^ $(LIBS) -o $@
build/static/qemb-serve: $(patsubst %,build/release/%.o,$(SERVE) $(BACKEND) $(ENGINE) packaging/static) | need-serve
	@mkdir -p $(@D)
	$(CC) $(STATIC) -fopenmp -pthread $^ $(SERVE_LIBS) $(LIBS) -o $@

# The packages whose libraries the programs contain: their licences go into the archive.
LINKED    = libgomp1 $(filter %-dev,$(DEBIAN_BUILD) $(DEBIAN_SERVE))
DIST     := qemb-$(VERSION)-$(shell uname -m)-linux
# Of the newest entry of the changelog: the same source gives the same bytes.
EPOCH     = $(shell date -ud "$$(sed -n 's/^ -- .*>  //p' packaging/debian/changelog | head -n 1)" +%s)

.PHONY: dist
dist: build/dist/$(DIST).tar.gz ## a portable archive of static programs, for any x86-64 Linux: build/dist/*.tar.gz
build/dist/$(DIST).tar.gz: build/static/qemb build/static/qemb-serve packaging/install.sh packaging/install.list packaging/debian/changelog
	rm -rf build/dist/$(DIST)
	$(call files,portable,build/static,build/dist/$(DIST))
	for p in $(LINKED); do install -D -m 644 /usr/share/doc/$$p/copyright build/dist/$(DIST)/share/doc/qemb/licenses/$$p; done
	install -m 644 LICENSE build/dist/$(DIST)/share/doc/qemb/
	tar -C build/dist --sort=name --mtime=@$(EPOCH) --owner=0 --group=0 --numeric-owner -c $(DIST) | gzip -9n >$@.tmp
	mv $@.tmp $@
