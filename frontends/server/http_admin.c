/* http_admin.c - what the operator asks of a running server; see request.h. */
#include "request.h"

#include "frontends/console.h"

static void resume(reload_call *c) {
    request *r = (request *)((char *)c - offsetof(request, reload));
    pool_finish(r->h->pool, r);
}

/* Tells which models serve now. */
static void answer_reloaded(request *r) {
    buffer body = {0};
    const char *comma = "";
    http_take_models(r); /* the new ones; http_end_work drops them */
    buffer_printf(&body, "{\"status\":\"reloaded\",\"seconds\":%.3f,\"fingerprints\":{",
                  seconds_now() - r->start);
    for (int i = 0; i < N_ROLES; i++, comma = ",") {
        const model_worker *w = r->models->workers[i];
        if (w)
            buffer_printf(&body, "%s\"%s\":\"%s\"", comma, role_name((role)i),
                          model_worker_fingerprint(w));
    }
    buffer_printf(&body, "}}");
    request_answer(r, 200, &body, JSON);
}

void http_end_reload(request *r) {
    r->error = r->reload.error;
    if (r->error.status)
        request_answer_error(r);
    else
        answer_reloaded(r);
}

int http_reload(request *r) {
    if (!r->h->keys) {
        api_fail(&r->error, 403, "admin_disabled", NULL,
                 "/admin/reload: only where requests need a key (want --api-key-file; or send the "
                 "process SIGHUP)");
        request_answer_error(r);
        return 1;
    }
    request_drop_body(r);
    r->reload.done = resume;
    if (!models_reload(r->h->models, &r->reload)) return 0; /* r may have its answer by now */
    http_end_reload(r);
    return 1;
}
