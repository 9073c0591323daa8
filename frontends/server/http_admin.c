/* http_admin.c - what the operator asks of a running server; see request.h. */
#include "request.h"

#include "frontends/console.h"

static void resume(reload_call *c) {
    request *r = (request *)((char *)c - offsetof(request, reload));
    MHD_resume_connection(r->connection);
}

/* Tells which models serve now. */
static enum MHD_Result answer_reloaded(request *r) {
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
    return request_answer(r, 200, &body, JSON);
}

enum MHD_Result http_reload(request *r) {
    if (!r->h->keys) {
        api_fail(&r->error, 403, "admin_disabled", NULL,
                 "/admin/reload: only where requests need a key (want --api-key-file; or send the "
                 "process SIGHUP)");
        return request_answer_error(r);
    }
    if (r->phase == WAITING) {
        r->error = r->reload.error;
        return r->error.status ? request_answer_error(r) : answer_reloaded(r);
    }
    http_drop_models(r); /* not to keep the old ones while the new ones are loaded */
    request_drop_body(r);
    r->phase = WAITING;
    r->reload.done = resume;
    pthread_mutex_lock(&r->h->lock);
    r->conn->timed = 0; /* the client waits for the server */
    pthread_mutex_unlock(&r->h->lock);
    MHD_suspend_connection(r->connection); /* before models_reload: it may end at once */
    if (models_reload(r->h->models, &r->reload)) MHD_resume_connection(r->connection);
    return MHD_YES;
}
