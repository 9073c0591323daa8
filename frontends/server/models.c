/* models.c - sets of models and the change from one to the next; see models.h.
 *
 * All but take and drop is done by one thread, in models_tick, so that a set is opened, started,
 * exchanged, stopped and freed in a fixed order without further locks.
 */
#include "models.h"

#include "frontends/console.h"
#include "frontends/format.h"
#include "frontends/open_model.h"
#include "log.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

struct models {
    models_options opt;
    model_set *sets;    /* all that are in memory */
    model_set *loading; /* the one that is to take over, or NULL */
    int serves;         /* the current set has been loaded */
    double since;       /* when the reload began */
    pthread_mutex_t lock; /* guards the members below, and the sets' refs */
    model_set *current;
    int wanted, closed;
    reload_call *call; /* who waits for the reload that is wanted or running, or NULL */
    int running;
};

/* ---- sets ------------------------------------------------------------------------------------ */

static void set_free(model_set *s) {
    for (int i = 0; i < N_ROLES; i++)
        if (s->workers[i]) model_worker_free(s->workers[i]);
    free(s);
}

/* What the worker with that role is opened with; model.model NULL: there is none. */
static model_worker_options options_of(const models_options *o, role role) {
    const char *const files[N_ROLES] = {o->worker.model.model, o->fallback, o->reranker};
    model_worker_options own = o->worker;
    own.role = role;
    own.model.model = files[role];
    if (role == ROLE_FALLBACK) own.model.engine.max_tokens = 0; /* from its file */
    if (role == ROLE_RERANKER) {                                /* it has a task only */
        own.model.engine.max_tokens = o->reranker_max_tokens;
        own.model.query = own.model.document = 0;
        own.model.prompt = NULL;
    }
    return own;
}

/* Opens the files. Returns NULL with *err and the file in *path. */
static model_set *set_open(const models_options *o, const char **path, qemb_err *err) {
    model_set *s = calloc(1, sizeof *s);
    int bad = !s;
    *path = o->worker.model.model;
    if (!s) qemb_fail(err, "out_of_memory", "models: out of memory");
    for (int i = 0; i < N_ROLES && !bad; i++) {
        const model_worker_options own = options_of(o, (role)i);
        if (!own.model.model) continue;
        *path = own.model.model;
        s->workers[i] = model_worker_open(&own, err);
        bad = !s->workers[i];
    }
    if (!bad && model_worker_is_reranker(s->workers[ROLE_MAIN]) && (o->fallback || o->reranker))
        bad = qemb_fail(err, "usage",
                        "--fallback, --reranker: beside an embedding model (got the reranker "
                        "%.128s)",
                        o->worker.model.model);
    if (!bad) {
        s->created = time(NULL);
        return s;
    }
    if (s) set_free(s);
    return NULL;
}

static int set_start(model_set *s, qemb_err *err) {
    for (int i = 0; i < N_ROLES; i++)
        if (s->workers[i] && model_worker_start(s->workers[i], err)) return -1;
    return 0;
}

static void set_tick(model_set *s, double now) {
    for (int i = 0; i < N_ROLES; i++)
        if (s->workers[i]) model_worker_tick(s->workers[i], now);
}

static void set_stop(model_set *s) {
    for (int i = 0; i < N_ROLES; i++)
        if (s->workers[i]) model_worker_stop(s->workers[i]);
    s->stopped = 1;
}

static int set_join(model_set *s, double seconds) {
    int joined = 1;
    for (int i = 0; i < N_ROLES; i++)
        if (s->workers[i]) joined &= model_worker_join(s->workers[i], seconds);
    return joined;
}

/* Returns 1 if every model has computed a vector, 0 if that is to come, -1 with *err if it will
 * not. */
static int set_loaded(const model_set *s, qemb_err *err) {
    int loaded = 1;
    for (int i = 0; i < N_ROLES; i++) {
        model_worker *w = s->workers[i];
        if (!w) continue;
        if (model_worker_failed(w, err)) return -1;
        const model_worker_state state = model_worker_state_of(w);
        const char *path = model_worker_model_options(w)->model;
        if (state == WORKER_FAILING)
            return qemb_fail(err, "non_finite", "%.128s: its vector of an empty text is not finite",
                             path);
        if (state == WORKER_CHANGED || state == WORKER_DEAD)
            return qemb_fail(err, "model_file", "%.128s: %s", path,
                             state == WORKER_DEAD ? "its device failed"
                                                  : "written to while it was loaded");
        loaded &= state == WORKER_READY;
    }
    return loaded;
}

/* ---- start ----------------------------------------------------------------------------------- */

static void add_set(models *m, model_set *s) {
    s->next = m->sets;
    m->sets = s;
}

models *models_open(const models_options *o) {
    qemb_err err;
    const char *path;
    models *m = need(calloc(1, sizeof *m));
    m->opt = *o;
    pthread_mutex_init(&m->lock, NULL);
    model_set *s = set_open(o, &path, &err);
    if (!s && !strcmp(err.code, "usage")) usage("%s", err.msg);
    if (!s) refuse_model_file(path, &err);
    add_set(m, s);
    m->current = s;
    return m;
}

void models_start(models *m) {
    qemb_err err;
    if (set_start(m->current, &err)) DIE(STATUS_MODEL, "%s", err.msg);
}

/* ---- taking ---------------------------------------------------------------------------------- */

model_set *models_take(models *m) {
    pthread_mutex_lock(&m->lock);
    model_set *s = m->current;
    s->refs++;
    pthread_mutex_unlock(&m->lock);
    return s;
}

void models_drop(models *m, model_set *s) {
    pthread_mutex_lock(&m->lock);
    s->refs--;
    pthread_mutex_unlock(&m->lock);
}

int models_retry_after(models *m) {
    model_set *s = models_take(m);
    const int seconds = model_worker_retry_after(s->workers[ROLE_MAIN]);
    models_drop(m, s);
    return seconds;
}

/* ---- reloading ------------------------------------------------------------------------------- */

void models_want_reload(models *m) {
    pthread_mutex_lock(&m->lock);
    m->wanted = !m->closed;
    pthread_mutex_unlock(&m->lock);
}

int models_reload(models *m, reload_call *c) {
    int bad = 0;
    pthread_mutex_lock(&m->lock);
    if (m->closed) {
        bad = api_fail(&c->error, 503, "shutting_down", NULL, "server: it is being stopped");
        c->error.retry_after = 1;
    } else if (m->running || m->wanted) {
        bad = api_fail(&c->error, 409, "reload_runs", NULL, "server: a reload is running already");
    } else {
        m->wanted = 1;
        m->call = c;
    }
    pthread_mutex_unlock(&m->lock);
    return bad;
}

/* Ends the reload; err NULL: the new models serve. */
static void finish_reload(models *m, const qemb_err *err) {
    pthread_mutex_lock(&m->lock);
    reload_call *c = m->call;
    m->call = NULL;
    m->running = 0;
    pthread_mutex_unlock(&m->lock);
    const double seconds = seconds_now() - m->since;
    char quoted[6 * sizeof err->msg + 3];
    metrics_add(m->opt.worker.metrics, err ? COUNT_RELOAD_FAILURES : COUNT_RELOADS, 1);
    if (err) {
        *format_json_string(quoted, err->msg, strlen(err->msg)) = 0;
        log_line("error", "reload_failed", "\"seconds\":%.3f,\"message\":%s", seconds, quoted);
        if (c) api_fail(&c->error, 500, "reload_failed", NULL, "%s", err->msg);
    } else {
        log_line("info", "reloaded", "\"seconds\":%.3f", seconds);
    }
    if (c) c->done(c);
}

/* Returns whether the reload that is wanted is to begin. */
static int begin_reload(models *m) {
    pthread_mutex_lock(&m->lock);
    const int begin = m->wanted && !m->running && m->serves;
    if (begin) {
        m->wanted = 0;
        m->running = 1;
    }
    pthread_mutex_unlock(&m->lock);
    return begin;
}

static void open_next(models *m) {
    qemb_err err;
    const char *path;
    m->since = seconds_now();
    log_line("info", "reloading", "\"by\":\"%s\"", m->call ? "request" : "signal");
    model_set *s = set_open(&m->opt, &path, &err);
    if (s) add_set(m, s);
    if (s && !set_start(s, &err))
        m->loading = s;
    else
        finish_reload(m, &err); /* sweep closes what there is of s */
}

/* Lets the loading set take over if it can. */
static void exchange(models *m) {
    qemb_err err;
    const int loaded = set_loaded(m->loading, &err);
    if (!loaded) return;
    pthread_mutex_lock(&m->lock);
    if (loaded > 0) m->current = m->loading;
    pthread_mutex_unlock(&m->lock);
    m->loading = NULL;
    finish_reload(m, loaded > 0 ? NULL : &err);
}

/* Whether nobody can take or has taken s. */
static int is_unused(models *m, const model_set *s) {
    pthread_mutex_lock(&m->lock);
    const int unused = s != m->current && s != m->loading && !s->refs;
    pthread_mutex_unlock(&m->lock);
    return unused;
}

/* Stops the sets that are not in use, and frees them when their threads have ended. */
static void sweep(models *m) {
    for (model_set **p = &m->sets, *s; (s = *p);) {
        if (is_unused(m, s) && !s->stopped) set_stop(s);
        const long created = (long)s->created;
        if (is_unused(m, s) && set_join(s, 0)) {
            *p = s->next;
            set_free(s);
            log_line("info", "retired", "\"created\":%ld", created);
        } else {
            p = &s->next;
        }
    }
}

void models_tick(models *m, double now) {
    qemb_err err;
    for (model_set *s = m->sets; s; s = s->next) set_tick(s, now);
    if (!m->serves) {
        const int loaded = set_loaded(m->current, &err);
        for (int i = 0; loaded < 0 && i < N_ROLES; i++)
            if (m->current->workers[i] && model_worker_failed(m->current->workers[i], &err))
                DIE(STATUS_MODEL, "%s", err.msg);
        m->serves = loaded != 0; /* also one that fails now: a reload may mend it */
    }
    if (begin_reload(m)) open_next(m);
    if (m->loading) exchange(m);
    sweep(m);
}

int models_dead(models *m) {
    int dead = 0;
    for (int i = 0; i < N_ROLES; i++) {
        model_worker *w = m->current->workers[i];
        dead |= w && model_worker_state_of(w) == WORKER_DEAD;
    }
    return dead;
}

/* ---- the end --------------------------------------------------------------------------------- */

void models_end_reloads(models *m) {
    pthread_mutex_lock(&m->lock);
    reload_call *c = m->call;
    m->call = NULL;
    m->wanted = 0;
    m->closed = 1;
    pthread_mutex_unlock(&m->lock);
    if (!c) return;
    api_fail(&c->error, 503, "shutting_down", NULL, "server: it is being stopped");
    c->error.retry_after = 1;
    c->done(c);
}

void models_stop(models *m) {
    for (model_set *s = m->sets; s; s = s->next) set_stop(s);
}

int models_join(models *m, double seconds) {
    int joined = 1;
    for (model_set *s = m->sets; s; s = s->next) joined &= set_join(s, seconds);
    return joined;
}

void models_free(models *m) {
    for (model_set *s = m->sets, *next; s; s = next) {
        next = s->next;
        set_free(s);
    }
    pthread_mutex_destroy(&m->lock);
    free(m);
}
