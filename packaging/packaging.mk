# packaging.mk - what people install: files under PREFIX, a Debian package, a portable archive, images.

PREFIX  ?= /usr/local
LIBDIR  ?= lib
UNITDIR ?= lib/systemd/system
ZSHDIR  ?= share/zsh/site-functions
STRIP   ?= strip
VERSION := $(shell sed -n 's/.*QEMB_VERSION "\(.*\)"/\1/p' qemb.h 2>/dev/null)
# $(call files,ACTION,PROGRAMS,INTO): runs install.sh with the programs of one folder, into another
files = DESTDIR="$(DESTDIR)" INTO="$(3)" PREFIX="$(PREFIX)" LIBDIR="$(LIBDIR)" UNITDIR="$(UNITDIR)" ZSHDIR="$(ZSHDIR)" STRIP="$(STRIP)" VERSION="$(VERSION)" SONAME="$(strip $(SONAME))" PROGRAMS="$(2)" packaging/install.sh $(1)

.PHONY: install uninstall
install: qemb qemb-serve build/lib/libqemb.a build/lib/libqemb.so ## programs, manuals, completion, the unit, the demo model and the C library under PREFIX (/usr/local); also while they run
	@$(call files,install,.,$(DESTDIR)$(PREFIX))

uninstall: ## removes what make install put under PREFIX
	@$(call files,uninstall,.,$(DESTDIR)$(PREFIX))

# ---- the portable archive -------------------------------------------------------------------------

# Programs that need no library of the machine that they run on, glibc included: packaging/static.c
# has what they do without. The linker's warnings are about what static.c prevents.
STATIC := -static-pie $(RELRO) -Wl,--no-warnings
build/static/qemb: $(patsubst %,build/release/%.o,$(FRONT) $(BACKEND) $(ENGINE) packaging/static)
	@mkdir -p $(@D)
	$(CC) $(STATIC) -pthread $^ $(LIBS) -o $@
build/static/qemb-serve: $(patsubst %,build/release/%.o,$(SERVE) $(BACKEND) $(ENGINE) packaging/static)
	@mkdir -p $(@D)
	$(CC) $(STATIC) -pthread $^ $(SERVE_LIBS) $(LIBS) -o $@

# The packages whose libraries the programs contain: their licences go into the archive.
LINKED    = $(filter %-dev,$(DEBIAN_BUILD))
DIST     := qemb-$(VERSION)-$(shell uname -m)-linux
# Of the newest entry of the changelog: the same source gives the same bytes.
EPOCH     = $(shell date -ud "$$(sed -n 's/^ -- .*>  //p' packaging/debian/changelog | head -n 1)" +%s)

.PHONY: dist
dist: build/dist/$(DIST).tar.gz ## a portable archive of static programs, for any x86-64 Linux: build/dist/*.tar.gz
DIST_FILES = LICENSE $(shell sed -n '/^---/q; s/^\(file\|text\) *\([^ ]*\).*/\2/p' packaging/install.list 2>/dev/null)
build/dist/$(DIST).tar.gz: build/static/qemb build/static/qemb-serve packaging/install.sh packaging/install.list packaging/debian/changelog $(DIST_FILES)
	rm -rf build/dist/$(DIST)
	$(call files,portable,build/static,build/dist/$(DIST))
	for p in $(LINKED); do install -D -m 644 /usr/share/doc/$$p/copyright build/dist/$(DIST)/share/doc/qemb/licenses/$$p; done
	install -m 644 LICENSE build/dist/$(DIST)/share/doc/qemb/
	tar -C build/dist --sort=name --mtime=@$(EPOCH) --owner=0 --group=0 --numeric-owner -c $(DIST) | gzip -9n >$@.tmp
	mv $@.tmp $@

# ---- the Debian packages --------------------------------------------------------------------------

DEB := build/deb/qemb-$(VERSION)
comma := ,
NOT_SOURCE := .git .venv .venv-golden .venv-world build qemb qemb-serve qemb-cuda qemb-serve-cuda
.PHONY: deb need-deb
# The tag that lintian leaves out asks for the bug that a first upload to Debian closes.
need-deb: need-build
	$(call need,$(DEBIAN_DEB))
deb: need-deb ## Debian packages of this release: build/deb/*.deb
	rm -rf build/deb
	mkdir -p $(DEB)
	tar -c $(NOT_SOURCE:%=--exclude=./%) . | tar -x -C $(DEB)
	mv $(DEB)/packaging/debian $(DEB)/debian
	sed -i 's/@BUILD_DEPENDS@/$(subst $() ,$(comma) ,$(filter-out libc6-dev,$(filter %-dev,$(DEBIAN_BUILD))))/' $(DEB)/debian/control
	cd $(DEB) && MAKEFLAGS= dpkg-buildpackage -us -uc -b -j$(JOBS)
	lintian --fail-on error,warning --suppress-tags initial-upload-closes-no-bugs build/deb/*.changes

# ---- images ---------------------------------------------------------------------------------------

# Docker if its daemon answers, else Podman, which needs none.
BUILD_IMAGE ?= $(if $(shell docker info >/dev/null 2>&1 || command -v podman),podman build --format docker,docker build)
.PHONY: image image-cuda
image: dist ## an image of qemb-serve from the portable archive, 24 MB: qemb-serve:VERSION
	$(BUILD_IMAGE) -t qemb-serve:$(VERSION) -f packaging/image/Dockerfile build/dist/$(DIST)

image-cuda: ## an image of qemb-serve-cuda on NVIDIA's base image: qemb-serve-cuda:VERSION
	$(BUILD_IMAGE) -t qemb-serve-cuda:$(VERSION) -f packaging/image/Dockerfile.cuda .
