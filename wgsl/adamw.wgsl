// One step over a run of the arenas. hyper: lr, gradient scale, apply. c: two bias corrections per page of {{ page }} vec4s, from page
// {{ first }} on. `shadow` takes p in f16.
// From vec4 number starts[n] on, the weight decay is decays[n] and the learning rate is scales[n] times that of hyper.
{# Inside: i < count, the vec4s of the stretch; every arena's binding is as long. hyper has three elements, c two per page. #}
{% include "shared/group" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let i = group_id(wid) * {{ size }}u + lid;
    if (i >= {{ count }}u || hyper_at(2u) == 0.0) {
        return;
    }
{% if starts|length == 1 %}
    let decay = {{ decays[0] }};
    let lr = hyper_at(0u){% if not same_rate %} * {{ scales[0] }}{% endif %};
{% else %}
    var decay = {{ decays[0] }};
    var lr_scale = {{ scales[0] }};
{% for n in range(1, starts|length) %}
    if (i >= {{ starts[n] }}u) {
        decay = {{ decays[n] }};
{% if not same_rate %}
        lr_scale = {{ scales[n] }};
{% endif %}
    }
{% endfor %}
    let lr = hyper_at(0u) * lr_scale;
{% endif %}
    let g = g_load(i) * hyper_at(1u);
    let m = {{ beta1 }} * m_load(i) + {{ one_minus_beta1 }} * g;
    let v = {{ beta2 }} * v_load(i) + {{ one_minus_beta2 }} * g * g;
    m_store(i, m);
    v_store(i, v);
    let page = 2u * ({{ first }}u + i / {{ page }}u);
    let step = (m / c_at(page)) / (sqrt(v / c_at(page + 1u)) + {{ eps }});
    let p = p_load(i);
    let next = p - lr * (decay * p + step);
    p_store(i, next);
{% if shadow %}
    shadow_store(i, next);
{% endif %}
}
